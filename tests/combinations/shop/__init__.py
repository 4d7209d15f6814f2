"""A shop with several tenants: Django, and tasks of Celery's."""
