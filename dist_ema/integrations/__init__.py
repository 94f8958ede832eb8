"""Glue to training frameworks, one module for each; a framework is imported by its module alone."""
