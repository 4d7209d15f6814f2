"""manage.py."""

from __future__ import annotations

import os
import sys

from django.core.management import execute_from_command_line

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.support.djangoproject.settings")
if __name__ == "__main__":
    execute_from_command_line(["manage.py", *sys.argv[1:]])
