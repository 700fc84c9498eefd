"""Measure a model on held-out data; imports qlora, never the reverse."""
