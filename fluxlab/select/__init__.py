"""Where an edit or a probe acts: tokens, words, axes, steps, blocks and heads of a token sequence."""
