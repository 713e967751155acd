"""Where objects come from; nothing below a source knows which one is in use."""
