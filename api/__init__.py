"""The HTTP surface: one turn from request to last token, and the views of agents and cluster."""
