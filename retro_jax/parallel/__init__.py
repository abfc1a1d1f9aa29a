"""Device meshes and the rules that map logical axes to them."""
