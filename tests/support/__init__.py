"""What the tests share: rank processes, clusters, object stores, faulty storage, models and states."""
