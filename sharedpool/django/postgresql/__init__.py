"""The engine `sharedpool.django.postgresql`."""
