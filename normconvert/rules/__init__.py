"""Rules: one file per rewrite, each a function from a graph to verdicts and expressions."""
