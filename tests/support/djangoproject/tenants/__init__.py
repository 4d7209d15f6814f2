"""django-tenants' engine, as it is, over a shared pool."""
