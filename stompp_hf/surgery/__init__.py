"""From a model to a binarized one and back: which layers, in which order, and the plan that says so."""
