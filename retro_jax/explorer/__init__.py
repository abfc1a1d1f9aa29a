"""A page on which a person sees what each chunk was given by retrieval, and what that changed (paper section 4.5)."""
