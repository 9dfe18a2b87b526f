"""Pure torch and TorchRec modules; they know no file and no process group."""
