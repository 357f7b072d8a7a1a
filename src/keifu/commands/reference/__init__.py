"""Commands that tell about models and about the command line; they train and run nothing."""
