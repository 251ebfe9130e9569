"""Fused subclasses of the blocks of one library or family per module, imported when a model holds such blocks."""
