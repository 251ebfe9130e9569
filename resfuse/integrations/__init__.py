"""Fused subclasses of the blocks of one library per module, imported only when a model holds such blocks."""
