"""Writing of a model as one file that needs torch alone: the code that it executes, without the rest of keifu."""
