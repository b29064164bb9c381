"""Built-in data modules and the loader that lets a killed run continue in the middle of an epoch."""
