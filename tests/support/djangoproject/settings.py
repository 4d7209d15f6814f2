"""Settings of the test project; the database is told by the environment, as JSON."""

from __future__ import annotations

import json
import os

SECRET_KEY = "tests"
USE_TZ = True
DEBUG = os.environ.get("SHOP_DEBUG") == "1"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.support.djangoproject.urls"
INSTALLED_APPS = ["tests.support.djangoproject.shop"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": json.loads(os.environ["SHOP_DATABASE"])}
