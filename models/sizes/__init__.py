"""Pictures of any size: the tiles that networks run in, and the memory that coding takes."""
