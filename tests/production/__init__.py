"""Real servers and no mocks: `make test-production`, which sets LEWIS_PRODUCTION; `make test` leaves these out."""
