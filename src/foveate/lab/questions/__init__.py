"""Questions about a long text, asked of a pretrained model: needles, recall, variables, aggregation."""
