CREATE EXTENSION pg_llm_batch;

CREATE TABLE tweets (
    id bigint PRIMARY KEY,
    body text NOT NULL,
    rating numeric NOT NULL,          -- the mean of the people's ratings, -4 to 4
    human text NOT NULL,              -- what that says: positive from 0.5 up, negative from -0.5 down
    sentiment text,                   -- to be filled by the model
    sentiment_single text             -- the same, for comparison, with a request for each row
);
