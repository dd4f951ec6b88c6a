from rainfusion.testing import ConformanceSuite


class TestAcme(ConformanceSuite):
    backend = "acme"
