"""Pictures that come with a request: where they may come from, what they are, and how large, before any is decoded."""
