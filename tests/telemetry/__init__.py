"""Tests of the statistics on their way from the device to the route."""
