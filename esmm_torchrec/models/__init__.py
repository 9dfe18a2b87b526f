"""Pure torch and TorchRec modules, independent of files and process groups."""
