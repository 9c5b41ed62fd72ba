"""The paper's tables on real data: one cell a class, seed and method, each kept as JSON."""
