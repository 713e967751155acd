"""Policies in a real lab: what connections and packets find, beside the plain model's answer."""
