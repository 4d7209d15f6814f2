"""Django's half: `gunicorn tests.combinations.shop.wsgi`."""

from __future__ import annotations

import os

from django.core.wsgi import get_wsgi_application

from tests.combinations.shop import tasks  # noqa: F401  the application of Celery's that its tasks belong to

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.combinations.shop.settings")
application = get_wsgi_application()
