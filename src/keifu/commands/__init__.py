"""The command line's verbs, one file each with `parse(arguments)`; nothing else in keifu knows them."""
