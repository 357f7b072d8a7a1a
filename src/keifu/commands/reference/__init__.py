"""Small commands about published models, the command line and the demonstration."""
