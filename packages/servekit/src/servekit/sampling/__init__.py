"""How a request asks for its tokens, and what turns logits into them."""
