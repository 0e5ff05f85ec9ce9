"""One folder an operation; the implementations stand beside each other."""
