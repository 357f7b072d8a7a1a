"""Small models trained by keifu's own recipes, each a Hugging Face directory with its card beside this file."""
