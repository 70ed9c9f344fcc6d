"""Samplers that go by an order: one that is drawn beforehand, or one that the model has learned."""
