"""The commands, `python -m experiments.NAME`; modules with an underscore are what they share."""
