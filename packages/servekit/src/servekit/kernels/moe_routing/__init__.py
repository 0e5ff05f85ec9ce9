"""Which experts a token goes to, and how much each counts."""

from servekit.kernels.moe_routing.reference import route
from servekit.kernels.moe_routing.rule import Routing

__all__ = ["Routing", "route"]
