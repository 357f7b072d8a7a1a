"""Generation in C++ on a CPU: the source, its build at first use, and the binding to models and the engine."""
