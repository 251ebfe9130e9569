"""fold: an eval-only copy of a network, batch normalisation folded into its weights, run by an engine."""
