"""Tables and hardware → a sharding plan → DistributedModelParallel."""
