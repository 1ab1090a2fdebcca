"""Beneath the wrapper: buckets, when backward brings gradients, what is done with a full bucket, equal replicas."""
