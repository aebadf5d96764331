"""`pando key`: a new API key for a tenant, and what the tenants file holds in its place.

Knows how keys are hashed through `router.auth`. Keeps nothing: the key is shown once.
"""

from __future__ import annotations

import argparse
import sys


def add_key(parser: argparse.ArgumentParser) -> None:
    """Flags of `pando key`."""
    parser.add_argument("tenant", help="name of the tenant")


def key(given: argparse.Namespace) -> int:
    """The lines for the tenants file on stdout, so that `>>` can add them; the key itself on stderr."""
    from router.auth import check_tenant_name, make_key

    check_tenant_name(given.tenant)
    secret, digest = make_key()
    name = given.tenant if "." not in given.tenant else f'"{given.tenant}"'
    print(f'[tenants.{name}]\nkeys = ["{digest}"]', flush=True)
    print(f"the key of {given.tenant}, shown only now: {secret}", file=sys.stderr)
    return 0
