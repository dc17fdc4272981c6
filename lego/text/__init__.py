"""From a source of text to tokens: readers, sources, corpus, tokenizers, n-gram references."""
