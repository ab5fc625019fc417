"""Recipes: their YAML files, the loader and schema that check them, the runner and the stages it runs."""
