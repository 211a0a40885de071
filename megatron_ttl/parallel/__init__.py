"""How one model lies on several processes: the mesh, the loss over it, and the engine's construction."""
