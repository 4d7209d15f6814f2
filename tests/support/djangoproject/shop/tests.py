"""For `manage.py test --parallel`: several classes, so that there is something to share out."""

from __future__ import annotations

from django.db import connection, transaction
from django.test import TestCase, TransactionTestCase

from .models import Item


class InATransaction(TestCase):
    @classmethod
    def setUpTestData(cls) -> None:
        Item.objects.create(name="first")

    def test_what_was_set_up_is_there(self) -> None:
        Item.objects.create(name="second")
        assert list(Item.objects.order_by("id").values_list("name", flat=True)) == ["first", "second"]

    def test_and_nothing_else(self) -> None:
        assert Item.objects.count() == 1

    def test_hooks_run(self) -> None:
        seen: list[int] = []
        with self.captureOnCommitCallbacks(execute=True):
            transaction.on_commit(lambda: seen.append(1))
        assert seen == [1]


class AnotherInATransaction(InATransaction):
    """The same, for another process."""


class WithoutOne(TransactionTestCase):
    def test_what_is_committed_is_there(self) -> None:
        with transaction.atomic():
            Item.objects.create(name="one")
        assert Item.objects.count() == 1

    def test_and_nothing_else(self) -> None:
        assert Item.objects.count() == 0
        assert connection.settings_dict["NAME"].startswith("test_")
