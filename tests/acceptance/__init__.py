"""Runs the Gateway API cases of ../shared/gateway-api against a real running gateway."""
