"""Official state-dict keys <-> ours, one module a family."""
