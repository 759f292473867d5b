-- Has an adapter had a generation before? Asked of all but the first one, so that what is uploaded once costs no page more.

CREATE INDEX generations_again ON generations (adapter, generation, seq) WHERE seq > 1;
