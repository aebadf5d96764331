"""The scripts that Redis runs for the prefix index; `redis_index` says what its keys hold.

Knows no Python caller. Invariant: whatever writes begins with the fence, so a worker's older life changes nothing.
"""

# Every script: KEYS epoch, meta, events; ARGV epoch, bucket prefix, seq. It returns the newest epoch, or -1 if Redis
# does not hold the state that the call builds on.
FENCE = """
local newest = tonumber(redis.call('GET', KEYS[1]) or '0')
if newest > tonumber(ARGV[1]) then return newest end
local base = ARGV[2]

local function bucket(set, tier, buckets, key)
  local a, b, c = string.byte(key, 1, 3)
  return base .. set .. ':' .. tier .. ':' .. ((a + b * 256 + c * 65536) % buckets)
end

local function drop(set, buckets)
  for tier = 0, 1 do
    for i = 0, tonumber(buckets) - 1 do redis.call('UNLINK', base .. set .. ':' .. tier .. ':' .. i) end
  end
end

local function append(payload, limit)
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', limit, ARGV[1] .. '-' .. ARGV[3], 'b', payload)
end
"""

# ARGV seq before it, payload, most batches kept, set; then for each event its kind with its tier ("S0"), and its keys
# in one string.
PUBLISH = """
local meta = redis.call('HMGET', KEYS[2], 'epoch', 'seq', 'set', 'buckets')
if meta[1] ~= ARGV[1] or meta[2] ~= ARGV[4] or meta[3] ~= ARGV[7] then return -1 end
local set, buckets = meta[3], tonumber(meta[4])
append(ARGV[5], ARGV[6])
for i = 8, #ARGV, 2 do
  local kind, tier, keys = string.sub(ARGV[i], 1, 1), tonumber(string.sub(ARGV[i], 2)), ARGV[i + 1]
  if kind == 'C' then drop(set, buckets) end
  for at = 1, #keys, 16 do
    local key = string.sub(keys, at, at + 15)
    if kind == 'R' then
      redis.call('HDEL', bucket(set, tier, buckets, key), key)
    else
      redis.call('HSET', bucket(set, tier, buckets, key), key, '')
      if kind == 'T' then redis.call('HDEL', bucket(set, 1 - tier, buckets, key), key) end
    end
  end
end
redis.call('HSET', KEYS[2], 'seq', ARGV[3])
return newest
"""

# The seq and the set that Redis holds of this epoch, empty if of none.
PROBE = """
local meta = redis.call('HMGET', KEYS[2], 'epoch', 'seq', 'set')
if meta[1] ~= ARGV[1] then return {newest, '', ''} end
return {newest, meta[2] or '', meta[3] or ''}
"""

BEGIN = """
local meta = redis.call('HMGET', KEYS[2], 'epoch', 'seq', 'set', 'buckets', 'pending', 'pending_buckets')
if meta[5] then drop(meta[5], meta[6]) end
if meta[1] ~= ARGV[1] or tonumber(meta[2] or '0') >= tonumber(ARGV[3]) then
  if meta[3] then drop(meta[3], meta[4]) end
  redis.call('DEL', KEYS[2], KEYS[3])
end
redis.call('HSET', KEYS[2], 'epoch', ARGV[1], 'pending', ARGV[4], 'pending_buckets', ARGV[5])
return newest
"""

# ARGV set, tier; then keys of one bucket in one string, as many strings as there are.
ADD = """
local meta = redis.call('HMGET', KEYS[2], 'pending', 'pending_buckets')
if meta[1] ~= ARGV[4] then return -1 end
local buckets = tonumber(meta[2])
for i = 6, #ARGV do
  local fields, keys = {}, ARGV[i]
  for at = 1, #keys, 16 do
    fields[#fields + 1] = string.sub(keys, at, at + 15)
    fields[#fields + 1] = ''
  end
  redis.call('HSET', bucket(ARGV[4], ARGV[5], buckets, keys), unpack(fields))
end
return newest
"""

COMMIT = """
local meta = redis.call('HMGET', KEYS[2], 'pending', 'pending_buckets', 'set', 'buckets')
if meta[1] ~= ARGV[4] then return -1 end
append(ARGV[5], ARGV[6])
redis.call('HSET', KEYS[2], 'set', meta[1], 'buckets', meta[2], 'seq', ARGV[3])
redis.call('HDEL', KEYS[2], 'pending', 'pending_buckets')
if meta[3] then drop(meta[3], meta[4]) end
return newest
"""

# No KEYS: a reader may not name what it cannot write. ARGV meta, bucket prefix, set, tier, first and last bucket.
READ = """
if redis.call('HGET', ARGV[1], 'set') ~= ARGV[3] then return false end
local parts = {}
for i = tonumber(ARGV[5]), tonumber(ARGV[6]) do
  parts[#parts + 1] = table.concat(redis.call('HKEYS', ARGV[2] .. ARGV[3] .. ':' .. ARGV[4] .. ':' .. i))
end
return table.concat(parts)
"""
