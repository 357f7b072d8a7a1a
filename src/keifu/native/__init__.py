"""Text generation in C++ on a CPU: the source, its compilation at first use, and the binding to models and the
engine."""
