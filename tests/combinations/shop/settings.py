"""As docs/django.md and docs/redis.md say."""

from __future__ import annotations

import os

SECRET_KEY = "tests"
USE_TZ = True
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.combinations.shop.views"
MIDDLEWARE = ["tests.combinations.shop.views.ErrorsInWords"]
LEASE = os.environ["SHOP_LEASE"]
DATABASES = {
    "default": {
        "ENGINE": "sharedpool.django.postgresql",
        "NAME": "postgres",
        "USER": "shop",
        "HOST": "127.0.0.1",
        "PORT": os.environ["SHOP_POSTGRES"],
        "OPTIONS": {
            "sslmode": "disable",
            "pool": {"name": "shop", "max_size": int(os.environ["SHOP_CAP"]), "timeout": 60, "lease": LEASE},
        },
    }
}
REDIS = f"redis://127.0.0.1:{os.environ['SHOP_REDIS']}"
CELERY_BROKER_URL = f"{REDIS}/0"
CELERY_RESULT_BACKEND = (
    f"sharedpool.integrations.redis.celery:SharedBackend+{REDIS}/2?pool=results&timeout=60"
    f"&max_connections={os.environ['SHOP_RESULTS']}"
)
